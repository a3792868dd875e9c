"""The plugin does all that a plugin must."""

from autodeco.testing import FamilyContract


class TestMixtral(FamilyContract):
    plugin = "mixtral"
