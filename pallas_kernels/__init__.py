"""Pallas kernels of jaxflash and the language that its backends share."""
