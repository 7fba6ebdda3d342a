"""The kernel oracle: a disposable guest that mounts crash states and tells what is in them."""
