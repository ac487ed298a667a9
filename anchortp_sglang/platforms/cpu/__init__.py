"""What SGLang lacks on a machine without a GPU: environment, sgl_kernel stand-in, collectives."""
