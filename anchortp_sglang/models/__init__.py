"""Models beside those of SGLang, in a package of the form that its ``ModelRegistry.register`` takes."""
