"""Make the dataset of 100 classes that docs/results.md uses in place of CIFAR-100.

    python docs/experiments/hundred_classes.py DATA OUT

DATA holds `gtsrb` and `cifar10`, each as image folders `{train,test}/<class>/*`; OUT is made in the same layout. The classes
are GTSRB's 43, other images of 37 of them upside down (those that look the same so are left out), CIFAR-10's ten, and the ten
of scikit-learn's digits: at most 150 training and 30 test images a class, of 32x32 pixels.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

IMAGES_PER_CLASS = {"train": 150, "test": 30}
SAME_UPSIDE_DOWN = {6, 12, 15, 17, 32, 40}  # classes of GTSRB


def save(folder: Path, images: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(folder / f"{i:03d}.png")


def opened(paths: list[Path]) -> list[Image.Image]:
    return [Image.open(path) for path in paths]


def from_folders(data: Path, name: str, out: Path, rng: np.random.Generator) -> None:
    """Classes of `name`, and for GTSRB the upside-down ones."""
    for split in ("test", "train"):  # the order of the draws: do not change
        for folder in sorted((data / name / split).iterdir()):
            files = sorted(folder.iterdir())
            files = [files[i] for i in rng.permutation(len(files))]
            count = IMAGES_PER_CLASS[split]
            if name == "gtsrb" and int(folder.name) not in SAME_UPSIDE_DOWN:
                count = min(count, len(files) // 2)
                turned = [image.rotate(180) for image in opened(files[count : 2 * count])]
                save(out / split / f"down_{folder.name}", turned)
            save(out / split / f"{name}_{folder.name}", opened(files[:count]))


def from_digits(out: Path) -> None:
    digits = load_digits()
    for label in range(10):
        images = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in digits.images[digits.target == label]]
        save(out / "train" / f"digit_{label}", images[:145])
        save(out / "test" / f"digit_{label}", images[145:175])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for name in ("gtsrb", "cifar10"):
        from_folders(args.data, name, args.out, rng)
    from_digits(args.out)


if __name__ == "__main__":
    main()
