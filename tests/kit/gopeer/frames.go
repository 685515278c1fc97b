package main

import (
	"encoding/binary"
	"net"
	"sync"

	"golang.org/x/net/http2"
)

// watched counts the frames of HTTP/2 on the connections it accepts, because grpc-go
// tells nobody of pings, nor of its reason to say GOAWAY.
type watched struct {
	net.Listener
	peer *peer
}

func (w watched) Accept() (net.Conn, error) {
	accepted, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	client := &conn{Conn: accepted, peer: w.peer}
	client.in = frames{skip: len(http2.ClientPreface), seen: client.received}
	client.out = frames{seen: client.sent}
	w.peer.change(func() { w.peer.Serving++ })
	return client, nil
}

type conn struct {
	net.Conn
	peer    *peer
	in, out frames
	leaves  sync.Once
}

func (c *conn) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	c.in.pass(data[:n])
	return n, err
}

func (c *conn) Write(data []byte) (int, error) {
	c.out.pass(data) // first: who is told to go may be gone when this has returned
	return c.Conn.Write(data)
}

func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}

func (c *conn) leave() {
	c.leaves.Do(func() { c.peer.change(func() { c.peer.Serving-- }) })
}

func (c *conn) received(kind string) {
	c.peer.change(func() { c.peer.Frames["received "+kind]++ })
}

func (c *conn) sent(kind string) {
	c.peer.change(func() { c.peer.Frames["sent "+kind]++ })
	if kind[:2] == "GO" {
		c.leave()
	}
}

// frames tells of each frame in the bytes of one direction.
type frames struct {
	skip int
	head []byte
	seen func(kind string)
}

func (f *frames) pass(data []byte) {
	for len(data) > 0 {
		if f.skip > 0 {
			n := min(f.skip, len(data))
			f.skip, data = f.skip-n, data[n:]
			continue
		}
		f.head, data = append(f.head, data[0]), data[1:]
		if len(f.head) < 9 {
			continue
		}
		// Length, kind, flags and stream; GOAWAY has its last stream and reason then.
		kind := http2.FrameType(f.head[3])
		name := kind.String()
		size := int(binary.BigEndian.Uint32(append([]byte{0}, f.head[:3]...)))
		if kind == http2.FramePing && http2.Flags(f.head[4]).Has(http2.FlagPingAck) {
			name += " ACK"
		}
		if kind == http2.FrameGoAway {
			if len(f.head) < 17 {
				continue
			}
			name += " " + http2.ErrCode(binary.BigEndian.Uint32(f.head[13:])).String()
			size -= 8
		}
		f.seen(name)
		f.skip, f.head = size, f.head[:0]
	}
}
