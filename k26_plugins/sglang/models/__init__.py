"""What SGLang's registry scans for model classes.

Importing it makes the rest of the adapter active too, for SGLang releases that know only this package's name.
"""

from k26_plugins.sglang import register

register()
