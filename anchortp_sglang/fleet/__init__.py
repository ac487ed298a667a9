"""A fleet: several servers on Ray Serve, behind an ingress whose streams outlive a server and its host."""
