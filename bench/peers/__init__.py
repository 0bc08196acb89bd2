"""Those that `bench/hybrid.py` measures, each in a process of its own, behind one small protocol."""
