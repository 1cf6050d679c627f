"""Benchmarks: ways to train within less memory, on the same networks, in time and memory.

    make bench                                   # everything; writes docs/benchmarks.md and its pictures
    make bench ARGS="--quick"                    # small sizes; writes into runs/bench-quick
    python -m benchmarks --workload stack        # one workload
    python -m benchmarks --render                # the page again, from the saved figures

`workloads` says what is computed, `engines` by which means, `measure` runs in a fresh process and times or weighs a
step, `run` starts those processes and saves what they say, `render` makes the page.
"""
