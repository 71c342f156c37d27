"""Render the toy world into a folder.

    python -m lab.toy DIR
"""

from dataclasses import asdict, dataclass

from cli import option, parse, run
from lab import toy


@dataclass
class Options:
    folder: str = option(None, "absent or empty", positional=True)
    seed: int = option(0, "of everything", low=0)
    clips: int = option(864, "videos", low=0)
    images: int = option(16, "labelled images of each label", low=0)
    captioned: int = option(720, "captioned images", low=0)
    level: int = option(1, "2: every other clip and captioned image is of two shapes", low=1, high=2)
    size: int = option(toy.SIZE, "pixels a side, even and at least 16")


def main():
    toy.render(**asdict(parse(Options, __doc__)))


if __name__ == "__main__":
    run(main)
