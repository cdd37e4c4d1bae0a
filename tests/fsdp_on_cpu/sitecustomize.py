"""On PYTHONPATH of a child process: lets accelerate 1.15 use FSDP on a CPU.

Its list of the kinds of launch for which an FSDP plugin is read (`AcceleratorState.__init__`) lacks MULTI_CPU, so that FSDP becomes
DDP there without a word. torch's own FSDP2 works on a CPU.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

LIST = "elif self.distributed_type in [\n                DistributedType.MULTI_GPU,"


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        text = self.get_data(path).decode()
        if LIST not in text:
            raise ImportError(f"{path} has changed: tests/fsdp_on_cpu may not be needed any more")
        return self.source_to_code(text.replace(LIST, f"{LIST} DistributedType.MULTI_CPU,").encode(), path)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "accelerate.state":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.origin is not None
        spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
