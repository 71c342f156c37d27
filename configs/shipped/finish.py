"""The tiny model, fourth of six runs: every timestep alike, and stills of things that move.

    python train.py configs/shipped/first.py configs/shipped/finish.py

Half of the images here are of something that moves and say so, which tells what FPS 0 and FPS 120 mean to a prompt of
motion: unrelated places, and one place.
"""

init = "runs/shipped_all/model.safetensors"
vae = ""
out_dir = "runs/shipped_finish"

toy = "data/toy-moving"
toy_moving = True
encoded = "data/toy-moving-encoded"
fps_values = (4, 8, 15, 30, 60)
starts = 1
mix = {"video": 10, "label": 3, "caption": 3}

timesteps = (0, 1000)
guidance = 1.3  # chosen on validation triples: more makes motion too fast, none cuts some clips

seed = 3  # not the noise of the runs before
max_steps = 9500
cooldown = 5500
save_every = 500
