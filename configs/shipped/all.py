"""The tiny model, third of six runs: every timestep.

    python train.py configs/shipped/first.py configs/shipped/all.py
"""

init = "runs/shipped_frames/model.safetensors"
vae = ""
out_dir = "runs/shipped_all"

encoded = "data/toy-encoded"
fps_values = (4, 8, 15, 30, 60)
starts = 1
mix = {"video": 6, "label": 1, "caption": 1}

timesteps = (0, 1000)
timestep_shift = 2.0  # 1024 latent pixels agree on one background: it is decided where the signal is 1/1000

seed = 2  # not the noise of the runs before
max_steps = 4000
cooldown = 1500
