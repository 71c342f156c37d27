"""x"""

import importlib.util
import math
import os

from cli import check_writable
from lab import ablation
from lab.evals.clip import command_clip
from lab.evals.fvd import ENOUGH, command_fvd
from lab.evals.toy import ANSWERS, command_toy, grade_fps, grade_prompts, trajectory_distances
from lab.evals.vae import command_vae
from sample import SHIPPED, NoiseSchedule
from sd.checkpoint import Parser, command_line, number_from
from sd.device import pick_device


def command_ablation(args):
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError('the figure wants matplotlib: pip install -e ".[dev]"')
    for path in (args.results, args.figure):  # now, not after hours
        check_writable(path)
    ablation.ablate(args.results, score)
    results = ablation.read_results(args.results)
    print("\n".join(ablation.tables(results)))
    ablation.figure(results, args.figure)
    print(args.figure)


def score(model, fps_values) -> dict:
    """What is noted of a model of the ablations."""
    options = {"batch_size": 24, "steps": 25}
    right, n, cuts, _, tracks = grade_prompts(model, "test", seeds=1, **options)
    rows = grade_fps(model, "test", fps_values, **options)
    return {"videos": n, **{name: right[name] for name in ANSWERS}, "wrong cuts": cuts,
            "trajectories": trajectory_distances(tracks, "test", 1, model.settings.fps)["model"],
            "px a frame": {fps: row[0] if row else math.nan for fps, row in rows.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = Parser(description="Score a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("toy", help="grade videos of the toy world's prompts")
    p.add_argument("--ckpt", default=SHIPPED)
    p.add_argument("--split", choices=("test", "val", "train"), default="test",
                   help="test: the held-out triples; val: those that guidance, eta and checkpoint are chosen on")
    p.add_argument("--seeds", type=number_from(1), default=4, help="videos a prompt")
    p.add_argument("--steps", type=number_from(1, NoiseSchedule.timesteps), default=50)
    p.add_argument("--guidance", type=float, help="default: the model's")
    p.add_argument("--eta", type=number_from(0, 1, float), help="default: the model's")
    p.add_argument("--no_fps", action="store_true", help="leave out the table of motion against FPS")
    p.add_argument("--json", metavar="FILE", help="append the numbers to a JSON-lines file")
    p.add_argument("--failures", metavar="FILE.png", help="a picture of the videos that were graded wrong")
    p.set_defaults(run=command_toy)

    p = commands.add_parser("fvd", help="Fréchet video distance of two sets of videos")
    p.add_argument("real", metavar="REAL", help="a folder of videos, a list, or encoded clips")
    p.add_argument("gen", metavar="GEN", help="likewise")
    p.add_argument("--i3d", required=True, metavar="FILE", help="i3d_torchscript.pt, which most papers use")
    p.add_argument("--videos", type=number_from(1), default=ENOUGH, help="at most, of each set")
    p.add_argument("--frames", type=number_from(1), default=16)
    p.add_argument("--fps", type=float, help="to sample both at (default: consecutive frames)")
    p.add_argument("--size", default="256x256", metavar="WxH", help="frames are brought to, before I3D's own 224x224")
    p.add_argument("--seeds", type=number_from(1), default=3,
                   help="choices of videos and starts; the least distance counts")
    p.add_argument("--ckpt", help="the model whose VAE decodes encoded clips")
    p.add_argument("--cache", default=os.path.expanduser("~/.cache/etc-video/features"), help="of features, by content")
    p.set_defaults(run=command_fvd)

    p = commands.add_parser("clip", help="CLIP score of videos and their captions")
    p.add_argument("videos", metavar="LIST_OR_DIR")
    p.add_argument("--prompts", metavar="FILE", help="one a line, in the order of the videos, instead of captions")
    p.add_argument("--frames", type=number_from(1), default=16, help="scored of each video")
    p.add_argument("--model", default="ViT-B-32", help="of open_clip")
    p.add_argument("--pretrained", default="openai", help="open_clip's name of the weights, or a file")
    p.set_defaults(run=command_clip)

    p = commands.add_parser("vae", help="PSNR and SSIM of frames encoded one by one and stitched")
    p.add_argument("--ckpt", default=SHIPPED)
    p.add_argument("--video", metavar="LIST", help="clips to encode (default: true renders of the toy world)")
    p.add_argument("--clips", type=number_from(1), default=48)
    p.add_argument("--frames", type=number_from(1), help="(default: the model's)")
    p.add_argument("--size", metavar="WxH", help="of frames of a list (default: the model's)")
    p.set_defaults(run=command_vae)

    for p in commands.choices.values():
        p.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")

    p = commands.add_parser("ablation", help="the paper's ablations in small: trains what has no result yet")
    p.add_argument("--results", default="docs/ablation.jsonl", metavar="FILE", help="one line a run, appended to")
    p.add_argument("--figure", default="docs/ablation.png", metavar="FILE.png")
    p.set_defaults(run=command_ablation)
    args = parser.parse_args()
    if "device" in args:
        args.device = pick_device(args.device)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
