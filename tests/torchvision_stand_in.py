"""What deepinv imports of torchvision, as empty names, so that it can be tested where torchvision is not.

None of it is used by denoisers, physics or solvers.
"""

import importlib.util
import sys
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NAMES = {
    "": [],
    ".datasets": [],
    ".datasets.folder": ["IMG_EXTENSIONS"],
    ".datasets.utils": ["download_and_extract_archive"],
    ".transforms": ["CenterCrop", "Compose", "InterpolationMode", "Resize", "ToTensor"],
    ".transforms.functional": ["crop", "rotate"],
    ".utils": ["make_grid", "save_image"],
}


@contextmanager
def stand_in_for_torchvision():
    """Within it, `import deepinv` works; afterwards nobody else sees the empty names.

    The Makefile puts deepinv into a folder of its own, as it cannot be complete without torchvision.
    """
    sys.path.append(str(Path(sys.prefix) / "apart"))
    if importlib.util.find_spec("torchvision"):
        yield
        return
    made = {}
    for path, names in NAMES.items():
        module = ModuleType(f"torchvision{path}")
        module.__path__ = []
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        for name in names:
            setattr(module, name, type(name, (), {"BILINEAR": None, "NEAREST": None}))
        made[module.__name__] = module
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    with suppress(ImportError):
        import torchmetrics  # noqa: F401 - before: it would look into what it takes for torchvision

    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
