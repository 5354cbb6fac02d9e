"""Where a derived number and a measured number stand on one line.

calibrate.py measures this machine's kernels (kernels.py) into a `Profile`; measure.py
trains for a few steps in a fresh process and trace.py sorts their seconds by path; run.py
holds the prediction against them.
published/ holds predictions against what others measured, and loads no torch.
"""
