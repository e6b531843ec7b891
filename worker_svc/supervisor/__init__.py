"""The supervisor: parent of every job and only writer of the store. Standard library and L0 modules only."""
