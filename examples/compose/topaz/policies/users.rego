# The known users, and the owner of each document.
package myapp.users

import rego.v1

# The name that the application sends. Topaz does not verify it.
name := input.identity.identity

known := {"alice", "bob"}

owners := {"1": "alice", "2": "bob"}
