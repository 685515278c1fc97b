# GET /documents: all known users may list documents.
package myapp.GET.documents

import rego.v1

# Without this default, a denial would be an error.
default allowed := false

allowed if data.myapp.users.name in data.myapp.users.known
