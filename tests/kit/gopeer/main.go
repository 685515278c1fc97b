// Gopeer is an authorizer in name only, on the gRPC library that Topaz is built on.
//
// Every other server of the tests is Python's, with another HTTP/2 below it. This one
// has no policies: a path that ends with "denied" is denied, one that ends with "held"
// gets no answer until its caller gives up, and all others are allowed.
//
// It says on stdout where it listens, and ends when stdin does. SIGTERM lets calls end
// first, SIGINT does not. Who connects to the second address gets the counts, as JSON.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// peer counts, for those who test the other side.
type peer struct {
	mu    sync.Mutex
	delay time.Duration

	Accepted int            // connections so far
	Open     int            // connections now
	Serving  int            // those of them that were not told to go
	Most     int            // of those, at once
	InFlight int            // calls now
	MostCall int            // calls at once
	Calls    map[string]int // by method
	Ended    map[string]int // calls whose caller gave up, by the error of their context
	Frames   map[string]int // by direction and kind, but not those within TLS
}

func (p *peer) change(what func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	what()
	p.Most = max(p.Most, p.Serving)
	p.MostCall = max(p.MostCall, p.InFlight)
}

func (p *peer) json() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	text, _ := json.Marshal(p)
	return append(text, '\n')
}

// -- calls

func (p *peer) serve(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	method := path.Base(full)
	var request []byte
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	p.change(func() { p.Calls[method]++; p.InFlight++ })
	defer p.change(func() { p.InFlight-- })
	switch method {
	case "Is":
		return p.decide(stream, request)
	case "Info":
		response := field(nil, 1, []byte("grpc-go "+grpc.Version))
		return stream.SendMsg(&response)
	}
	return status.Error(codes.Unimplemented, "no such method here: "+full)
}

// decide answers an IsRequest by an IsResponse.
func (p *peer) decide(stream grpc.ServerStream, request []byte) error {
	var policy string
	var response []byte
	for _, context := range fields(request, 1) {
		policy = string(append(fields(context, 1), nil)[0])
		for _, name := range fields(context, 2) {
			is := protowire.EncodeBool(!strings.HasSuffix(policy, "denied"))
			decision := protowire.AppendTag(field(nil, 1, name), 2, protowire.VarintType)
			response = field(response, 1, protowire.AppendVarint(decision, is))
		}
	}
	answered := time.After(p.delay)
	if strings.HasSuffix(policy, "held") {
		answered = nil
	}
	select {
	case <-answered:
		return stream.SendMsg(&response)
	case <-stream.Context().Done():
		err := stream.Context().Err()
		p.change(func() { p.Ended[err.Error()]++ })
		return status.FromContextError(err).Err()
	}
}

// fields returns the bytes of each field with that number.
func fields(message []byte, number protowire.Number) (found [][]byte) {
	for len(message) > 0 {
		this, kind, size := protowire.ConsumeField(message)
		if size < 0 {
			break
		}
		if this == number && kind == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(message)
			value, _ := protowire.ConsumeBytes(message[tag:])
			found = append(found, value)
		}
		message = message[size:]
	}
	return found
}

func field(message []byte, number protowire.Number, value []byte) []byte {
	message = protowire.AppendTag(message, number, protowire.BytesType)
	return protowire.AppendBytes(message, value)
}

// raw passes messages as the bytes they are.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(message any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*message.(*[]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, message any) error {
	*message.(*[]byte) = data.Materialize()
	return nil
}

// -- connections

func (p *peer) HandleConn(_ context.Context, event stats.ConnStats) {
	switch event.(type) {
	case *stats.ConnBegin:
		p.change(func() { p.Accepted++; p.Open++ })
	case *stats.ConnEnd:
		p.change(func() { p.Open-- })
	}
}

func (p *peer) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (p *peer) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (p *peer) HandleRPC(context.Context, stats.RPCStats)                         {}

// -- all together

func main() {
	p := &peer{Calls: map[string]int{}, Ended: map[string]int{}, Frames: map[string]int{}}
	listen := flag.String("listen", "127.0.0.1:0", "address")
	flag.DurationVar(&p.delay, "delay", 0, "time before a decision")
	age := flag.Duration("max-connection-age", 0, "then a connection is told to go")
	idle := flag.Duration("max-connection-idle", 0, "one without calls, then")
	ping := flag.Duration("min-ping", 0, "pings more often than this are too many")
	streams := flag.Uint("max-streams", 0, "calls at once on a connection")
	header := flag.Uint("max-header", 16<<20, "bytes of metadata")
	cert := flag.String("tls-cert", "", "PEM file")
	key := flag.String("tls-key", "", "PEM file")
	interop := flag.Bool("interop", false, "serve gRPC's interoperability tests instead")
	flag.Parse()

	options := []grpc.ServerOption{
		grpc.StatsHandler(p),
		grpc.MaxConcurrentStreams(uint32(*streams)),
		grpc.MaxHeaderListSize(uint32(*header)),
		// What is zero here has the default of grpc-go, as in Topaz.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: *age, MaxConnectionIdle: *idle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: *ping}),
	}
	if !*interop {
		options = append(options, grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(p.serve))
	}
	if *cert != "" {
		creds, err := credentials.NewServerTLSFromFile(*cert, *key)
		check(err)
		options = append(options, grpc.Creds(creds))
	}
	server := grpc.NewServer(options...)
	if *interop {
		serveInterop(server)
	}
	listener, err := net.Listen("tcp", *listen)
	check(err)
	counts, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		if <-signals == syscall.SIGTERM {
			server.GracefulStop()
		} else {
			server.Stop()
		}
	}()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // whoever started it is gone
		os.Exit(1)
	}()
	go func() {
		for {
			client, err := counts.Accept()
			check(err)
			_, _ = client.Write(p.json())
			_ = client.Close()
		}
	}()
	fmt.Println("grpc-go", grpc.Version, listener.Addr(), counts.Addr())
	if *cert == "" {
		listener = watched{listener, p}
	}
	check(server.Serve(listener))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
