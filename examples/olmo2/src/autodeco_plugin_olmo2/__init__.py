"""OLMo 2 for AutoDeco."""

from autodeco.plugin import FamilyPlugin

from autodeco_plugin_olmo2.family import FAMILY

plugin = FamilyPlugin(FAMILY)
