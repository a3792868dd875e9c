"""An example: Qwen2.5, its linear weights stored as eight-bit rows."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_int8_rows.family import FAMILY

plugin = FamilyPlugin(FAMILY)
