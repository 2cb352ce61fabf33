"""Trees of modules: models as declarative chains, with parent links and structural mutation.

Example:
    >>> import fluxion as fl
    >>> model = fl.Chain(fl.Linear(64, 32), fl.ReLU(), fl.Linear(32, 10))
    >>> model.insert_after_type(fl.ReLU, fl.Dropout(0.1))
"""

from fluxion.layers import *
from fluxion.layers import __all__ as _names

__version__ = "0.1.0"
__all__ = [*_names, "__version__"]
