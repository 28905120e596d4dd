"""What must be set before anything is imported."""

import os

# kernels for devices that are not here run in Triton's interpreter; it is chosen when triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")
