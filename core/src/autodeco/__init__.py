"""AutoDeco: teach a frozen language model its own temperature and top-p.

`import autodeco` loads neither torch nor transformers; `import autodeco.decoding` does.
"""

from __future__ import annotations

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("autodeco")

__all__ = ["__version__", "hookimpl"]
