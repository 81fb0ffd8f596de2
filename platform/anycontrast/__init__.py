"""anycontrast: pretrain 3D MRI transformers on studies with any subset of contrasts.

Importing this package loads no training stack: no Ray, DeepSpeed, Triton or webdataset.
"""

__version__ = "0.1.0"
