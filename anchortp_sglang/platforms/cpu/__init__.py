"""The platform of a machine without a GPU: environment, sgl_kernel stand-in, collectives."""
