"""The values that options may have, for help, completion and checks without importing torch.

A tuple that has the name of a dictionary beside the code lists its keys, in their order.
"""

DATASETS = ("digits", "mnist", "cifar10", "tinyimagenet", "imagefolder")
METHODS = (
    *("standard", "ibp", "fastibp", "acert", "random-ibp", "crown-ibp"),
    *("sabr", "mtl-ibp", "cc-ibp", "exp-ibp", "taps", "staps"),
)
PRESET_NAMES = ("paper", "best", "ctbench", "expressive-losses")
"""Where the settings come from that are not given; the first one is the default."""
SCHEDULES = ("smoothed", "linear", "none")
LEARNING_RATES = ("onecycle", "multistep")
INITIALIZATIONS = ("ibp", "kaiming", "own")
SOLVERS = ("brentq", "bisect", "fused", "tracked")
BOUNDS = ("ibp", "crown-ibp", "crown", "alpha-crown")
"""From the loosest, which costs least, to the tightest."""
CLAIMS = ("unchecked", "real", "float32")
"""What a certificate holds for; all but the first are proved."""
DIRECTIONS = ("gradient", "random")
"""Of the line in weight space that an inspection follows."""
SELECT = ("validation", "test")
"""The images on which reports choose kappa."""
COMPILE = ("auto", "on", "off")
"""Whether a run compiles its passes; auto for what `ibpcore.training.compiling` finds."""
WEIGHTS = ("last", "best")
"""The weights that a run delivers."""
ARCHITECTURES = (
    *("cnn3", "cnn4", "cnn5", "cnn6", "cnn7", "cnn8", "cnn9", "cnn11", "cnn13"),
    *("crown-ibp2", "crown-ibp3", "crown-ibp4", "dm-small", "dm-medium", "dm-large"),
    *("eran-small", "marabou", "oval-deep", "resnet2b", "resnet4b", "wide-resnet", "resnext"),
)
KNOWN_DATASETS = ("mnist", "cifar10", "tinyimagenet")
"""The data sets of imported networks whose sizes are known."""
SOURCES = ("fastibp", "expressive-losses", "sabr", "crown-ibp", "ctbench", "ctrain")
"""The repositories whose normalisations are known."""
ORDERS = ("file", "number")
"""Of the layers in an imported file: as stored, or by the numbers in their names."""
DATA_DIR, DATA_DIR_VARIABLE = "data", "IBP_DATA_DIR"
"""The folder of the data sets, unless this environment variable names another."""
MOST_THREADS = 1024
