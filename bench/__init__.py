"""Benchmarks of jaxflash, run from a checkout: `python -m bench` lists the tables."""
