"""Hostile and damaged inputs: whatever a file or a command line holds, the answer is a result or a sentence.

Every target of ``targets.py`` turns a small recipe into files with valid lengths and checksums, so that damage reaches
the code behind them, and hands them to the library in a forked child with bounds (``limits.py``): 5 seconds of work and
1 GB of memory. The only outcomes are success and ``UserError``, and every target must come to both.

In CI a few hundred to a few thousand inputs a target, always the same ones, take about a minute on one core::

    pytest tests/fuzz

By hand as many as wanted, other ones with another seed; what each target got through is counted at the end, failures
are shown once per kind with the smallest recipe found, and their files are kept::

    PYTHONPATH=tests python -m fuzz --inputs 1000000 --seed 1 [--minutes 60] [--keep FOLDER] [target …]
    PYTHONPATH=tests python -m fuzz --recipe "(0, …)" target
"""
