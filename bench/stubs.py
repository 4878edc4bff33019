"""Empty modules for packages that a library imports but that are not installed."""

import importlib.machinery
import sys
import types


class _Anything(type):
    """A class whose attributes are again such classes, which accept any arguments."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Stubs:
    """Finds and creates empty modules for packages that are not installed, and for all their submodules."""

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
    """Makes packages importable that are not installed; every attribute of them is a class.

    without: submodules that stay missing, so that a library uses the code for the case without them.
    """
    sys.modules.update(dict.fromkeys(without))
    sys.meta_path.append(_Stubs(names))  # last, so that installed packages are preferred
