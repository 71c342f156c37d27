"""The tiny model, last of six runs: the same by smaller steps, down to none.

    python train.py configs/shipped/{first,frames,all,finish,green}.py --init=runs/shipped_green/model.safetensors \\
        --out_dir=runs/shipped_last --seed=5 --max_steps=6500
    python train.py configs/shipped/{first,frames,all,finish,green,polish}.py

It goes on from a second turn of green.py, the first of these commands. Batches of 8 and a gradient that is clipped, for
the reasons that docs/tiny.md gives.
"""

init = "runs/shipped_last/model.safetensors"
out_dir = "runs/shipped_polish"

timestep_shift = 1.6  # more of where shapes are decided
eta = 1.0  # chosen on validation triples

seed = 6  # not the noise of the runs before
max_steps = 22000
batch_size = 8
lr = 3e-4
warmup = 200
cooldown = 21800
clip = 0.3
ema = 0.9995

log_every = 50
sheet_every = 2000
save_every = 2000
