"""Runs of `python -m lab.ablation paper`, which vary embeddings, mix, number of videos and seed, on top of run.py."""

out_dir = "runs/ablation"
encoded = "data/ablation"
fps_values = (4, 8)
draws = 8
mix = {"video": 2, "label": 1, "caption": 1}
