"""The operators of DALI that the graphs use, to see whether the installed DALI has them."""

from fastdisco.data.decoder import graphs

# On each device, by DALI's own names.
OPERATORS = {
    "CPU": {
        "readers__File",
        "readers__Webdataset",
        "PeekImageShape",
        "Resize",
        "Filter",
        "Hsv",
        "BrightnessContrast",
    },
    "Mixed": {"decoders__Image"},
    "GPU": {"Resize", "Slice", "GaussianBlur", "Hsv", "CropMirrorNormalize"},
}


def missing_operators() -> str:
    """What the graphs use and DALI does not have, in words; empty where it has all.

    Needs no GPU.  Raises UserError where DALI is not installed."""
    graphs()
    import nvidia.dali.backend as backend

    for kind, needed in OPERATORS.items():
        if lacking := needed - set(getattr(backend, f"Registered{kind}Ops")()):
            return f"{kind} operators {sorted(lacking)}"
    return ""
