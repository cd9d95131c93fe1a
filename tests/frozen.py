"""Loaded last by the process of which conftest.py forks the runs: what was imported is left out of garbage collections,
or each vLLM that starts would search it three times, a second of its two and a half."""
import gc

gc.collect()
gc.freeze()
