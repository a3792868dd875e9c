"""The plugin does all that a plugin must."""

from autodeco.testing import FamilyContract


class TestOlmo2(FamilyContract):
    plugin = "olmo2"
