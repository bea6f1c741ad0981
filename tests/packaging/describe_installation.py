"""Program that prints the file of the installed package, and its unmet requirements by extra, as JSON."""

import json

import tinyllama
from tinyllama.plan.system_info import unmet_requirements

print(json.dumps({"file": tinyllama.__file__, "unmet": unmet_requirements("tinyllama")}))
