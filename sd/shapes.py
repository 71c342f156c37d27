"""The architecture of a model, read off the shapes of its tensors."""

from model import UNetConfig
from sd.text import TextConfig
from sd.vae import VAEConfig

# What shapes do not tell. Our files carry it in the header, diffusers folders in config.json; else the family knows.
SHAPELESS = {
    "unet": ("head_width", "num_heads", "norm_groups", "mixed_embedding"),
    "vae": ("norm_groups",),
    "text": ("heads", "skip_last", "quick_gelu", "pad_id"),
}
FAMILY = {
    "SD 1": {"unet": {"head_width": None, "num_heads": 8}, "vae": {}, "text": {"quick_gelu": True, "pad_id": 49407}},
    "SD 2": {"unet": {"head_width": 64, "num_heads": None}, "vae": {}, "text": {"quick_gelu": False, "pad_id": 0}},
}
LICENCE = {"SD 1": "CreativeML Open RAIL-M", "SD 2": "CreativeML Open RAIL++-M"}


class Named(dict):
    """A dict out of a file, where a missing key is a fault of the file."""

    def __init__(self, items, file: str):
        super().__init__(items)
        self.file = file

    def __missing__(self, key):
        raise ValueError(f"{self.file} has no {key}; {EXPECTED}")


class Shapes(dict):
    """The shapes of a network's tensors by their names in it.

    One that is empty counts as missing, which is a fault of the file; one of less than two sides gets sides of 1.

    theirs  our name -> name in the file
    """

    def __init__(self, items, file: str, theirs):
        whole = {name: shape for name, shape in items.items() if 0 not in shape}
        super().__init__({name: (*shape, 1, 1)[: max(2, len(shape))] for name, shape in whole.items()})
        self.file, self.theirs = file, theirs

    def __missing__(self, key):
        raise ValueError(f"{self.file} lacks {self.theirs(key)}; {EXPECTED}")

    def has(self, layer: str) -> bool:
        """Whether there is any tensor of a layer."""
        return any(name.startswith(layer + ".") for name in self)


def count(shapes, prefix: str) -> int:
    """How many consecutive numbers, from 0, follow `prefix` in names of shapes, each before a dot."""
    found, n = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}, 0
    while str(n) in found:
        n += 1
    return n


# What a UNet is for that takes more channels than it gives.
INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}


def unet_config(shapes) -> UNetConfig:
    """shapes: name -> shape, names as inside the UNet."""
    (channels, takes, *_), latent = shapes["input_blocks.0.0.weight"], shapes["out.2.weight"][0]
    if takes != latent:
        raise ValueError(f"{shapes.file} seems to be {INPUTS.get(takes, 'another model')}: it takes {takes} channels "
                         f"and gives {latent}; {EXPECTED}")
    widths, blocks, attention = [[]], 0, set()
    for i in range(1, count(shapes, "input_blocks.")):
        if shapes.has(f"input_blocks.{i}.0.op"):
            widths.append([])
            continue
        widths[-1].append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
        if shapes.has(f"input_blocks.{i}.1"):
            attention.add(len(widths) - 1)
        blocks = max(blocks, len(widths[-1]))
    return UNetConfig(
        channels=channels,
        channel_mult=tuple((level or [0])[0] // channels for level in widths),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(attention)),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=len(shapes["middle_block.1.proj_in.weight"]) == 2,
        latent_channels=latent,
        fps_embedding="fps_proj.0.weight" in shapes,
    )


def vae_config(shapes) -> VAEConfig:
    channels = shapes["encoder.conv_in.weight"][0]
    levels = count(shapes, "encoder.down.")
    return VAEConfig(
        channels=channels,
        channel_mult=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // channels for i in range(levels)),
        num_res_blocks=count(shapes, "encoder.down.0.block."),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def text_config(shapes) -> TextConfig:
    vocab, width = shapes["model.token_embedding.weight"][:2]
    layers = count(shapes, "model.transformer.resblocks.")
    return TextConfig(
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        skip_last=1 if layers == 24 else 0,  # diffusers folders of SD 2 hold 23: without the one that is not used
        projection=shapes.get("model.text_projection", (0, 0))[1],
        vocab=vocab,
        length=shapes["model.positional_embedding"][0],
    )


EXPECTED = "expected is a whole Stable Diffusion 1.x or 2.x: UNet, VAE and text tower"
