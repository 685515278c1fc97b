# GET /documents: all users.
package myapp.GET.documents

import rego.v1

# Without it, a no would be an error.
default allowed := false

allowed if data.myapp.users.name in data.myapp.users.known
