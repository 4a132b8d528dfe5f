"""What the fork server imports for the tests of this folder: TransformerEngine first, so that Megatron finds it."""

from tests.te import stand_in

stand_in.install()

import tests.preload  # noqa: E402, F401
