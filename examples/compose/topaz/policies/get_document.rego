# GET /documents/{id}: all known users may read document 1. Its owner may read another.
package myapp.GET.documents.__id

import rego.v1

default allowed := false

allowed if {
	input.resource.id == "1"
	data.myapp.users.name in data.myapp.users.known
}

allowed if data.myapp.users.owners[input.resource.id] == data.myapp.users.name
