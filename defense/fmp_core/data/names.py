"""Names of BackdoorBench's (BB) files and datasets, and formats of images; for programs that need no torch."""

ATTACK_FILE = "attack_result.pt"  # of a record
DEFENSE_FILE = "defense_result.pt"  # of the result folder of a defense
RECORD_DEPTH = 4  # folders between a record root and its records
BB_DATASETS = ("cifar10", "cifar100", "gtsrb", "tiny", "mnist", "celeba", "imagenet")
# What datasets come in. Pillow knows formats that start programs (EPS) or that few have ever attacked.
IMAGE_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")
