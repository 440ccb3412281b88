"""Variational autoencoders, derived and checked in notebooks, trained by the library those notebooks export.

`import vae_nb as vb` is instant: a module is imported when one of its names, listed in `__init__.pyi`, is first used.
"""

__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
