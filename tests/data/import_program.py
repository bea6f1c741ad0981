"""Import modules and fail if one of them imports torch: `import_program.py MODULE...`."""

import importlib
import sys

for module in sys.argv[1:]:
    importlib.import_module(module)
    assert "torch" not in sys.modules, module
