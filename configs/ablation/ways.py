"""Runs of `python -m lab.ablation ways`, which vary the layout and the seed, on top of run.py."""

out_dir = "runs/ways"
encoded = "data/ways"
fps_values = (4,)
starts = 2
mix = {"video": 1}
