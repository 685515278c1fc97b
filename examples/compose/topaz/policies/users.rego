# Who is who, and whose documents are whose.
package myapp.users

import rego.v1

# What the application says of its caller; nothing of it is checked here.
name := input.identity.identity

known := {"alice", "bob"}

owners := {"1": "alice", "2": "bob"}
