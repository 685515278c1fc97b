# DELETE /documents/{id}: only its owner may delete a document.
package myapp.DELETE.documents.__id

import rego.v1

default allowed := false

allowed if data.myapp.users.owners[input.resource.id] == data.myapp.users.name
