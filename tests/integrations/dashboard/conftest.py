"""What the tests of the tab share."""

import warnings

with warnings.catch_warnings():
    # TensorBoard's own copy of html5lib says at its import that it is old.
    warnings.simplefilter("ignore", DeprecationWarning)
    import tensorboard.plugin_util  # noqa: F401
