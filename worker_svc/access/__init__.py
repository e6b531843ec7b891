"""Who may do what: roles, the guard that every RPC passes, the policy, TLS, and the checks before serving."""
