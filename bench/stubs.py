"""Empty modules for packages that a library imports and that are not installed where it is measured or
tested.
"""

import importlib.machinery
import sys
import types


class _Anything(type):
    """A class of which any attribute is another such class, made from any arguments."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Stubs:
    """Finds and makes empty modules for packages that are not installed, and for all that is in them."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Anything("", (), {}), name)
        module.__version__ = "2.8.3"
        return module

    def exec_module(self, module):
        pass


def stub(*names, without=()):
    """Lets packages be imported that are not installed here; whatever is asked of them is a class. without:
    parts that stay missing, so that a library goes the way it goes where it has none.
    """
    sys.modules.update(dict.fromkeys(without))
    sys.meta_path.append(_Stubs(names))  # last: what is installed comes first
