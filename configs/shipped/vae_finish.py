"""The second half of the tiny VAE's training: shapes get their corners. Changes to what tiny_vae.py does.

    python train.py configs/tiny_vae.py configs/shipped/vae_finish.py
"""

init = "runs/tiny_vae/model.safetensors"
out_dir = "runs/shipped_vae_finish"

seed = 1  # not the frames of the run before
max_steps = 3500
lr = 1.5e-3
cooldown = 2500
