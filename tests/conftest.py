from jaxtyping import install_import_hook

# shapes in signatures are checked while the tests run
install_import_hook(["megatron_cp.context"], "beartype.beartype")
