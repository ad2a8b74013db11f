"""Comparing convolution algorithms with each other and with other libraries, on the layers of real networks.

`workloads` names the layers, `providers` knows what can compute them, `check` whether it is right, `timing` how long
it takes, `report` shows it, and `compare` runs all of that. The ``test_bench_*`` files are pytest-benchmark suites.
``python -m fastconv compare`` is the command.
"""
