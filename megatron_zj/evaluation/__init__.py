"""Benchmarks: one file a family.

They know neither engines nor processes: what a model can do comes in as callables (``model.py``), what was found goes
out as dataclasses that ``dataclasses.asdict`` turns into JSON.
"""
